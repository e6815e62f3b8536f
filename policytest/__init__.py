"""Policy tests: what a person expects of policies, held against the model and real packets."""
