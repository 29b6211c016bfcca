"""Tests that take longer, or need something fetched: `make test-slow`."""
