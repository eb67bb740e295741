"""Teacher targets kept on disk: sampled, packed, written, verified and read."""
