"""Who may see whom in a packed row, and the backends that carry the rule out."""
