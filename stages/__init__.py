"""The pipeline's stages, one module each, in the order of dvc.yaml."""

from stages.runtime.machine import set_up_openmp

# Here, because a stage's first import may be torch.
set_up_openmp()
