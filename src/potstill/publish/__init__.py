"""A finished run on the Hub: plan, license, model card, upload and comparison of hashes."""
