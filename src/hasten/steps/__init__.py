"""Steps around a model: from what people send to what it takes, and from what it gives to what people want."""
