// Compiling the same kernels for several instruction sets. Everything between
// MMDGT_TARGET_BEGIN and MMDGT_TARGET_END may use the named instructions. The headers
// named *-inl.h stand there, compiled once per instruction set; all others are included
// before, so that the inline functions that other files share stay fit for every
// machine.
#pragma once

#define MMDGT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MMDGT_TARGET_BEGIN(isa) \
  MMDGT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define MMDGT_TARGET_END MMDGT_PRAGMA(clang attribute pop)
#else
#define MMDGT_TARGET_BEGIN(isa)  \
  MMDGT_PRAGMA(GCC push_options) \
  MMDGT_PRAGMA(GCC target(isa))
#define MMDGT_TARGET_END MMDGT_PRAGMA(GCC pop_options)
#endif

#define MMDGT_INLINE inline __attribute__((always_inline))
