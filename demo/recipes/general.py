"""The general checkpoint: every sign in Noto style, long-tailed; trains the text encoder along with the UNet."""

from .diffusion import Plan, train

PLAN = Plan("general", style="noto", domain=None, steps=9000)


def main(minutes=None, workers=1):
    train(PLAN, minutes, workers)
