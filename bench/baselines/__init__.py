"""What a user would run instead: eager PyTorch, numba, Triton, and the code of trainers and libraries themselves."""
