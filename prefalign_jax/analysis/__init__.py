"""Many runs, what they left, and what it shows."""
