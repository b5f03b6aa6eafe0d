"""Pictures that nodes show about their own work. Tensors and text in, IMAGE tensors out; no host, no files."""
