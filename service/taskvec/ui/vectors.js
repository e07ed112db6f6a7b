// Arithmetic on vectors: similarities of each output type, principal components.

export const OUTPUT_TYPES = ["float", "int8", "uint8", "binary", "ubinary"];

const BITS = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll("0", "").length);

const isPacked = (type) => type === "binary" || type === "ubinary";

export function bytesPerVector(type, dimensions) {
  if (isPacked(type)) return dimensions / 8;
  return type === "float" ? 4 * dimensions : dimensions;
}

export function cosine(a, b) {
  let dot = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) {
    dot += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return dot / (Math.sqrt(aa * bb) || 1);
}

/** Similarity of two vectors of an output type: the cosine, or 1 - 2 * the share of unequal bits. */
export function similarity(type, a, b) {
  if (type === "uint8") return cosine(Array.from(a, (v) => v - 128), Array.from(b, (v) => v - 128));
  if (!isPacked(type)) return cosine(a, b);
  const offset = type === "binary" ? 128 : 0;
  let unequal = 0;
  for (let i = 0; i < a.length; i++) unequal += BITS[(a[i] + offset) ^ (b[i] + offset)];
  return 1 - (2 * unequal) / (8 * a.length);
}

/** Indices of vectors by falling similarity with a query; equal ones keep their order. */
export function rank(type, query, vectors) {
  const scores = vectors.map((vector) => similarity(type, query, vector));
  return scores.map((score, index) => ({ index, score })).sort((a, b) => b.score - a.score || a.index - b.index);
}

/** Cosines of all pairs, row by row. */
export function similarityMatrix(vectors) {
  const n = vectors.length;
  const matrix = new Float32Array(n * n);
  for (let i = 0; i < n; i++) {
    matrix[i * n + i] = 1;
    for (let j = 0; j < i; j++) matrix[i * n + j] = matrix[j * n + i] = cosine(vectors[i], vectors[j]);
  }
  return matrix;
}

/**
 * The first two principal components of vectors.
 * Returns points ([x, y] of each vector) and explained, their share of the variance.
 */
export function principalComponents(vectors) {
  const n = vectors.length, d = vectors[0].length;
  const mean = new Float64Array(d);
  for (const vector of vectors) for (let k = 0; k < d; k++) mean[k] += vector[k] / n;
  const centred = vectors.map((vector) => Float64Array.from(vector, (value, k) => value - mean[k]));
  const gram = centred.map((a) => centred.map((b) => a.reduce((sum, value, k) => sum + value * b[k], 0)));
  const variance = gram.reduce((sum, row, i) => sum + row[i], 0);
  // Subspace iteration: the eigenvectors of the n x n matrix of dot products, largest first.
  let axes = [0, 1].map((axis) => Float64Array.from({ length: n }, (_, i) => Math.sin((i + 1) * (axis + 1.3))));
  let values = [0, 0];
  for (let step = 0; step < 200; step++) {
    axes = axes.map((axis) => Float64Array.from(gram, (row) => row.reduce((sum, value, j) => sum + value * axis[j], 0)));
    const overlap = dot(axes[0], axes[1]) / (dot(axes[0], axes[0]) || 1);
    axes[1] = axes[1].map((value, i) => value - overlap * axes[0][i]);
    values = axes.map((axis) => Math.sqrt(dot(axis, axis)));
    axes = axes.map((axis, a) => axis.map((value) => value / (values[a] || 1)));
  }
  const points = vectors.map((_, i) => axes.map((axis, a) => axis[i] * Math.sqrt(values[a])));
  return { points, explained: variance > 0 ? Math.min(1, (values[0] + values[1]) / variance) : 0 };
}

/** Rotate and reflect points so that they lie as near as possible to others: maps stay comparable. */
export function aligned(points, others) {
  let best = points, least = Infinity;
  for (const flip of [1, -1]) {
    let cross = 0, along = 0;
    points.forEach(([x, y], i) => {
      const [u, v] = others[i];
      along += x * u + flip * y * v;
      cross += x * v - flip * y * u;
    });
    const angle = Math.atan2(cross, along), cos = Math.cos(angle), sin = Math.sin(angle);
    const turned = points.map(([x, y]) => [x * cos - flip * y * sin, x * sin + flip * y * cos]);
    const distance = turned.reduce((sum, [x, y], i) => sum + (x - others[i][0]) ** 2 + (y - others[i][1]) ** 2, 0);
    if (distance < least) [best, least] = [turned, distance];
  }
  return best;
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
