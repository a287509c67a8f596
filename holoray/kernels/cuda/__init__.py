"""CUDA kernels: one family a `.cu` file, compiled by NVRTC for the device at hand."""
