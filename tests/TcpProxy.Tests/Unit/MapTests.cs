using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Text.RegularExpressions;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>The header's map and the order of the sections are promises to the reader.</summary>
public sealed class MapTests
{
    private static readonly string[] DesignOrder =
    [
        "PROGRAM", "OPTIONS", "COMMANDS", "PROXY", "ACCEPTOR", "ADMISSION", "UPSTREAMS", "CONNECT", "BRIDGE", "PUMP",
        "TAPS", "PREREAD", "OPERATE", "OBSERVE", "PLATFORM",
    ];

    private static readonly List<(int Number, string Name, string Text)> Sections = Split(Source.Program);

    [Fact]
    public void The_map_lists_the_sections_in_their_order()
    {
        string map = Source.Program[Source.Program.IndexOf("// MAP", StringComparison.Ordinal)..];
        List<(int, string)> listed =
        [
            .. Regex.Matches(map, @"^//\s+(\d+) ([A-Z]+)  ", RegexOptions.Multiline)
                .Select(m => (int.Parse(m.Groups[1].Value, CultureInfo.InvariantCulture), m.Groups[2].Value)),
        ];
        Assert.Equal(Sections.ConvertAll(s => (s.Number, s.Name)), listed);
        Assert.Equal(Enumerable.Range(1, Sections.Count), Sections.ConvertAll(s => s.Number));
    }

    [Fact]
    public void The_sections_stand_in_the_order_of_the_design()
    {
        List<int> places = Sections.ConvertAll(s => Array.IndexOf(DesignOrder, s.Name));
        Assert.DoesNotContain(-1, places);
        Assert.Equal(places.Order(), places);
    }

    [Fact]
    public void A_section_names_types_of_later_sections_only() => Assert.Empty(UpwardReferences(Sections));

    [Fact]
    public void A_planted_upward_reference_is_found()
    {
        (int number, string name, string text) = Sections[^1];
        List<(int, string, string)> planted = [.. Sections[..^1], (number, name, text + "\ninternal Bridge? Planted;")];
        Assert.Single(UpwardReferences(planted));
    }

    [Fact]
    public void Each_step_of_the_header_stands_at_its_code()
    {
        string code = Source.Program[Source.Program.IndexOf("// == 1 ", StringComparison.Ordinal)..];
        for (int step = 1; step <= 8; step++)
        {
            Assert.Contains($"({step})", code, StringComparison.Ordinal);
        }
    }

    private static List<string> UpwardReferences(List<(int Number, string Name, string Text)> sections)
    {
        List<string> found = [];
        Dictionary<string, int> home = [];
        foreach ((int number, _, string text) in sections)
        {
            foreach (Match type in Regex.Matches(
                text, @"^internal (?:\w+ )*(?:class|struct|enum|record|interface) (\w+)", RegexOptions.Multiline))
            {
                home[type.Groups[1].Value] = number;
            }
        }

        foreach ((int number, string name, string text) in sections)
        {
            HashSet<string> words = [.. Regex.Matches(Code(text), @"(?<![.\w])[A-Z]\w+").Select(m => m.Value)];
            found.AddRange(home.Where(type => type.Value < number && words.Contains(type.Key))
                .Select(type => $"{name} names {type.Key}"));
        }

        return found;
    }

    /// <summary>Without comments and strings.</summary>
    private static string Code(string text) =>
        Regex.Replace(text, """"\"""[\s\S]*?\"""|//[^\n]*|\$?"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'"""", "");

    private static List<(int Number, string Name, string Text)> Split(string program)
    {
        List<(int, string, string)> sections = [];
        MatchCollection marks = Regex.Matches(program, @"^// == (\d+)  ([A-Z]+) =+$", RegexOptions.Multiline);
        for (int i = 0; i < marks.Count; i++)
        {
            int end = i + 1 < marks.Count ? marks[i + 1].Index : program.Length;
            sections.Add((int.Parse(marks[i].Groups[1].Value, CultureInfo.InvariantCulture),
                marks[i].Groups[2].Value, program[marks[i].Index..end]));
        }

        return sections;
    }
}
