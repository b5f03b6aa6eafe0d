"""The networks: nn.Modules and the sizes that make them. No host, no files."""
