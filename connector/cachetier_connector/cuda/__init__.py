"""What runs where KV lies on a CUDA device: kernels, the driver's calls and the copy engine made of them."""
