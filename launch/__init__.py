"""What starts processes: on one machine, and later under torchrun and SLURM."""
