"""The training layer over `synface_kernels`: data, heads, training, evaluation."""

from .common.renamed import install

install()
