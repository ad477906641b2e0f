from __future__ import annotations

from registry_fixtures import add, artifacts, local_store, service, uri

__all__ = ["add", "artifacts", "local_store", "service", "uri"]
