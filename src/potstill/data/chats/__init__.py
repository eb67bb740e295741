"""Conversations as labelled ids: shapes of records, chat templates, and which tokens bear loss."""
