"""A finished run on the Hub: plan, licence, model card, upload and the comparison of hashes."""
