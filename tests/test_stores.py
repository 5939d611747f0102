from pathlib import Path
import pytest
from eventrun.testing import StoreConformance, SharedStoreConformance
from eventrun.stores import open_store
class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def store(self): return open_store("memory:")
class TestSqliteStore(SharedStoreConformance):
    @pytest.fixture
    def store(self, tmp_path): return open_store(tmp_path/"runs")
    @pytest.fixture
    def reopen(self, tmp_path): return lambda: open_store(tmp_path/"runs")
