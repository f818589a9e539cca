"""All that touches a user's model: hooks, replaced methods, and what goes through an attention."""
