"""The one way to a Redis or Valkey server: a deadline on every call, a circuit breaker, no retries, no surprises."""
