"""What a training run will need and cost on GPUs that are not here, from its compiled program."""
