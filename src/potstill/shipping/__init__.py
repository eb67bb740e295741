"""A student in the forms in which people run it, and proof that each form is that student."""
