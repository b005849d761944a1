"""TempMe as pure functions: how many tokens each layer merges (`schedule`), a transformer layer with merging (`block`),
and the published video path of a CLIP encoder with trained weights (`clip`). The merge step is `earlytom.bipartite`;
`earlytom.methods.published.tempme` is the part that needs no training."""
