// Numbers for people: few digits, units behind a narrow space that does not break.

const THIN = "\u202f";

export function count(value) {
  return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, THIN);
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${digits(value, unit)}${THIN}${units[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  if (seconds < 0.9995) {
    const ms = seconds * 1000;
    return `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)}${THIN}ms`;
  }
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)}${THIN}s`;
}

export function percent(share, places = 0) {
  return `${(100 * share).toFixed(places)}${THIN}%`;
}

/** "4.0× less", "the same", "1.2× more". */
export function against(value, whole) {
  if (!value || !whole) return "";
  const factor = whole / value;
  if (factor > 0.995 && factor < 1.005) return "the same";
  return factor > 1 ? `${factor.toFixed(1)}× less` : `${(1 / factor).toFixed(2)}× more`;
}

export function rate(value, unit) {
  if (!value) return "–";
  return `${value >= 100 ? count(value) : value.toFixed(1)}${THIN}${unit}`;
}

function digits(value, unit) {
  if (unit === 0) return value.toFixed(0);
  return value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0);
}
