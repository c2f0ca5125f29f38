"""What the proxy of `alignpro serve` adds to a request, and whether it holds what it promises under load."""
