// Renames inputs in workflows saved before the first release. nodes/renames.py does the same for prompts in API format;
// a test compares both tables.
import { app } from "../../scripts/app.js";

const TRAINING = { accumulation: "gradient_accumulation", average: "ema_decay", held_out: "validation_fraction" };
const INPUTS = {
  SaliencyNoiseBlend: { crop: "crop_margin" },
  SeedSelect: { keep: "survivors" },
  ChorusDemoReferences: { sign: "concept" }, // the saved name; plain: ok
  TrainCasDMHead: { ...TRAINING, sees_x: "condition_on_x_t" }, // the saved name; plain: ok
  TrainFaceRefiner: TRAINING,
};
const VALUES = {
  ChorusDemoReferences: { "all signs": "all concepts" }, // the saved value; plain: ok
  LoadSeed: { "chorus-demo carrot": "chorus-demo rabbit" },
};

function rename(nodes) {
  for (const node of nodes ?? []) {
    for (const input of node.inputs ?? []) {
      const name = INPUTS[node.type]?.[input.name];
      if (!name) continue;
      if (input.widget?.name === input.name) input.widget.name = name;
      input.name = name;
    }
    const values = VALUES[node.type];
    if (values && Array.isArray(node.widgets_values)) node.widgets_values = node.widgets_values.map(v => values[v] ?? v);
  }
}

app.registerExtension({
  name: "chorus.renames",
  beforeConfigureGraph(graph) {
    rename(graph.nodes);
    for (const subgraph of graph.definitions?.subgraphs ?? []) rename(subgraph.nodes);
  },
});

export { INPUTS, VALUES };
