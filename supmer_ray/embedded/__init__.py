"""stub, replaced by the helper that owns this folder"""
def resolve(name: str) -> str:
    return name
