"""The loop, and what it needs beside it."""
