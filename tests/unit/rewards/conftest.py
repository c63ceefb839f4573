import pytest

from tests.sandboxes import ON_DISK, has_name_spaces, make_system_lack


@pytest.fixture(params=["in memory", "on disk"])
def storage(request, monkeypatch):
    """Where the files of programs are: as this system gives it, and where none gives more."""
    if request.param == "on disk":
        make_system_lack(monkeypatch, ON_DISK)
    elif not has_name_spaces():
        pytest.skip("this system gives no name spaces: user.max_user_namespaces, or its container")
    return request.param
