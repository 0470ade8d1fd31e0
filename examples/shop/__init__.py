"""A small shop's four jobs for a tuned model, each with a held-out set and figures before and after."""
