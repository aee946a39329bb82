"""What a machine or a cluster runs: one file a job (settings in, files out), the command line above them, Ray beside them."""
