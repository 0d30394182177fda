"""All that waits for a machine with an NVIDIA GPU, in stages of minutes each; see __main__.py."""
