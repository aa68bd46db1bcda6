using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.Linq;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>Seeded random input to what people type. A FormatException with a message of one line is the only
/// answer that wrong input may get. TCPPROXY_FUZZ_SECONDS (./build.sh fuzz SECONDS) goes on for longer, with another
/// seed; TCPPROXY_FUZZ_SEED repeats a run.</summary>
public sealed class FuzzTests
{
    private const int Iterations = 30_000;
    private const int Tests = 7; // of all classes, one after the other

    private static readonly string[] Pieces =
    [
        "", " ", "-", "--", "=", ":", "::", "[", "]", "*", "#", "\"", "\\", "\n", "\r", "\t", "\0", "é", "🦊", "\ud800",
        "0", "1", "80", "8080", "65535", "65536", "99999999999999999999", "-1", "1-5", "5-1", "off", "echo", "discard",
        "localhost", "127.0.0.1", "1.2.3", "::1", "[::1]:80", "fe80::1%lo", "unix:", "unix:/tmp/x", "fd:", "fd:3", "a:1",
        "5s", "5x", "10m", "1h", "64k", "1g", "text", "json", "config", "/dev/null", "help", "once",
        "weight=3", "weight=", "backup", "=>", "a=>b", "\\0", "name=x", "max-connections=9", "slow-start=5s", "wieght=1", "\\x4", "\\n",
        .. Option.Table.Select(o => $"--{o.Name}"), .. Option.Table.Select(o => $"{o.Name} "),
        .. Option.Table.Where(o => o.Letter != '\0').Select(o => $"-{o.Letter}"),
    ];

    [Fact]
    public void The_parser_of_arguments() => Run((random, _) =>
    {
        string[] arguments = [.. Enumerable.Range(0, random.Next(8)).Select(_ => Word(random))];
        Attempt(() => CommandLine.Parse(arguments), arguments);
    });

    [Fact]
    public void The_parser_of_files() => Run((random, _) =>
    {
        string text = string.Concat(Enumerable.Range(0, random.Next(20)).Select(_ => Word(random) + (random.Next(3) == 0 ? "\n" : "")));
        Attempt(() => CommandLine.ReadFile("file", text), [text]);
    });

    [Fact]
    public void The_parsers_of_addresses_and_units() => Run((random, _) =>
    {
        string word = Word(random);
        Attempt(() => ListenAddress.Parse(word), [word]);
        Attempt(() => UpstreamAddress.Parse(word), [word]);
        Attempt(() => UpstreamSettings.Parse(word), [word]);
        Attempt(() => Text.Unescape(word), [word]);
        Attempt(() => MatchRule.ParseReplace(word), [word]);
        Attempt(() => Units.ParseTime(word), [word]);
        Attempt(() => Units.ParseSize(word), [word]);
        Attempt(() => Units.ParseCount(word), [word]);
    });

    [Fact]
    public void What_is_escaped_has_no_control_characters_and_no_bare_quote() => Run((random, _) =>
    {
        string escaped = Text.Escape(Word(random) + Word(random));
        Assert.DoesNotContain(escaped, char.IsControl);
        Assert.DoesNotContain("\"", escaped.Replace("\\\\", "", StringComparison.Ordinal)
            .Replace("\\\"", "", StringComparison.Ordinal), StringComparison.Ordinal);
    });

    private static void Attempt(Action parse, IReadOnlyList<string> input)
    {
        try
        {
            parse();
        }
        catch (FormatException e)
        {
            Assert.False(string.IsNullOrWhiteSpace(e.Message), Show(input));
            Assert.DoesNotContain("Exception", e.Message, StringComparison.Ordinal);
        }
#pragma warning disable CA1031 // any other exception is what this test looks for
        catch (Exception e)
#pragma warning restore CA1031
        {
            Assert.Fail($"{e.GetType().Name}: {e.Message}\ninput: {Show(input)}\n{e.StackTrace}");
        }
    }

    private static string Show(IReadOnlyList<string> input) =>
        string.Join(" ", input.Select(word => $"'{Text.Escape(word)}'"));

    private static string Word(Random random)
    {
        string word = string.Concat(Enumerable.Range(0, random.Next(1, 4)).Select(_ => Pieces[random.Next(Pieces.Length)]));
        if (random.Next(4) == 0 && word.Length > 0)
        {
            char[] letters = word.ToCharArray();
            letters[random.Next(letters.Length)] = (char)random.Next(random.Next(2) == 0 ? 128 : 65536);
            word = new string(letters);
        }

        return word;
    }

    internal static void Run(Action<Random, int> once)
    {
        int? seconds = Number("TCPPROXY_FUZZ_SECONDS");
        int seed = Number("TCPPROXY_FUZZ_SEED") ?? (seconds is null ? 1 : Environment.TickCount & int.MaxValue);
        Random random = new(seed);
        Stopwatch watch = Stopwatch.StartNew();
        try
        {
            int i = 0;
            for (; seconds is null ? i < Iterations : watch.Elapsed.TotalSeconds < seconds / (double)Tests; i++)
            {
                once(random, i);
            }

            TestContext.Current.TestOutputHelper?.WriteLine($"seed {seed}, {i} inputs");
        }
        catch (Exception e)
        {
            throw new InvalidOperationException($"TCPPROXY_FUZZ_SEED={seed} repeats this: {e.Message}", e);
        }
    }

    private static int? Number(string variable) =>
        int.TryParse(Environment.GetEnvironmentVariable(variable), CultureInfo.InvariantCulture, out int number) ? number : null;
}
