"""Operations as pure functions of arrays, each with a plain reference in its folder."""
