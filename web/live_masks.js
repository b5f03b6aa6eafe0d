// While a blend samples, its nodes show which model generates where. techniques/saliency_blend/comfy_live.py sends the
// masks, at most four a second.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const SETTING = "Chorus.LiveMasks";
const NODE = "SaliencyNoiseBlend";

// The node with an id such as 7, or 5:7 for node 7 of the subgraph of node 5.
function find(id) {
  const path = id.split(":"), last = path.pop();
  let graph = app.rootGraph ?? app.graph;
  for (const step of path) graph = graph?.getNodeById(step)?.subgraph;
  return graph?.getNodeById(last);
}

// Whether the node ``id`` of the open workflow can show a mask. The page shows the preview of a node in a subgraph also
// on the node of the subgraph, where it would alternate with the sampler's, so such a node shows its mask only while
// the subgraph is open.
function shows(id) {
  const node = find(id);
  return node?.type === NODE && (!id.includes(":") || node.graph === app.canvas.graph);
}

function show({ detail: { nodes, type, image } }) {
  if (app.extensionManager.setting.get(SETTING) === false) return;
  const blob = new Blob([Uint8Array.from(atob(image), letter => letter.charCodeAt(0))], { type });
  // the page's own event for previews; without a job, so that the queue does not show the mask as the job's image
  for (const id of nodes.filter(shows))
    api.dispatchCustomEvent("b_preview_with_metadata", { blob, nodeId: id, displayNodeId: id, realNodeId: id });
}

app.registerExtension({
  name: "chorus.live_masks",
  settings: [
    {
      id: SETTING,
      category: ["ComfyUI-Chorus", "Saliency Noise Blend", "Live masks"],
      name: "Show masks while sampling",
      tooltip:
        "Saliency Noise Blend shows which model generates where: the base is grey, the first expert orange, the second blue. A change takes effect at the next run.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  setup() {
    api.addEventListener("chorus.blend_mask", show);
  },
});
