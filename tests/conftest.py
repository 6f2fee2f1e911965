import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-scenarios", action="store_true", help="Write what state machines do now into their scenario files."
    )


@pytest.fixture
def rewrite_scenarios(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-scenarios"))
