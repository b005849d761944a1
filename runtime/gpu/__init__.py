"""Work on a GPU: streams, CUDA graphs, staging of frames. Nothing here knows of models."""
