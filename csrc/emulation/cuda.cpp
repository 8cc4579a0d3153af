#include "cuda.h"

namespace mmdgt::emulation {

uint32_t shuffle(uint32_t lanes, uint32_t value, int source) {
  struct Shuffle {
    uint32_t value, result;
    int source;
  } own{value, 0, source};
  exchange(lanes, own, [](const Lanes<Shuffle>& all) {
    all.for_each([&](Shuffle& lane) { lane.result = all[lane.source].value; });
  });
  return own.result;
}

uint32_t reduce(uint32_t lanes, uint32_t value, uint32_t (*combine)(uint32_t, uint32_t)) {
  struct Reduce {
    uint32_t value;
  } own{value};
  exchange(lanes, own, [&](const Lanes<Reduce>& all) {
    uint32_t result = own.value;
    all.for_each([&](Reduce& lane) {
      if (&lane != &own) result = combine(result, lane.value);
    });
    all.for_each([&](Reduce& lane) { lane.value = result; });
  });
  return own.value;
}

}  // namespace mmdgt::emulation

uint32_t __match_any_sync(uint32_t lanes, int value) {
  struct Match {
    int value, lane;
    uint32_t same;
  } own{value, mmdgt::emulation::this_thread().lane, 0};
  mmdgt::emulation::exchange(lanes, own, [](const mmdgt::emulation::Lanes<Match>& all) {
    all.for_each([&](Match& a) {
      all.for_each([&](const Match& b) {
        if (a.value == b.value) a.same |= 1u << b.lane;
      });
    });
  });
  return own.same;
}
