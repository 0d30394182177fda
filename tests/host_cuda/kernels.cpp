// The CUDA kernels and their bindings, compiled for the host: this folder has the runtime.
#include "conv_norm_act/normalization_cuda.cu"
#include "resample/resample_cuda.cu"
