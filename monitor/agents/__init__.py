"""Agent steps: risk levels from tool calls, a chain over them, a gate before a call runs."""
