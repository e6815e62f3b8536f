"""From policy files to the answer for one flow."""
