"""The engine: schedule, dispatch, collect; in the caller's thread or behind asyncio."""
