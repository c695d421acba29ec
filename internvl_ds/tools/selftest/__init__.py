"""Shows on the user's own machine and launcher that it trains, saves and fails as it should."""
