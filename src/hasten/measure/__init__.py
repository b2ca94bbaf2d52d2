"""Speed, quality, resources and the physical limit, each with its interval and conditions."""
