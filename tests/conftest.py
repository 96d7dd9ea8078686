"""What every test shares: Hypothesis runs a fixed sample, or the whole search where `SNPBOOK_TESTS=all`."""

from hypothesis import settings

from tests.sampling import ALL

settings.register_profile("sample", derandomize=True, database=None, deadline=None, max_examples=50)
settings.register_profile("all", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("all" if ALL else "sample")
