"""What items say: templates over their columns, and the tokens of it, made once."""
