"""What crosses a boundary: files, frames and messages, as frozen pydantic models. Knows no other package."""
