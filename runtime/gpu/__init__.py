"""Work on a GPU: streams, CUDA graphs, frames on their way there. Nothing here knows of models."""
