"""transformers' common tests that are not run on this package, each with the reason."""

SKIPPED: dict[str, str] = {
    "test_generation_tester_mixin_inheritance": (
        "`GenerationTesterMixin` is not in the source distribution; test_generation.py tests generation"
    ),
}
