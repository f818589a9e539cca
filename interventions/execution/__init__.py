"""A run, what it recorded, what is written into it, and requests as writes."""
